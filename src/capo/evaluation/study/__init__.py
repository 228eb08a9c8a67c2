"""A study with people: pairs of images, votes, what they say, and the page on which they are given."""
