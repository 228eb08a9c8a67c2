"""Configs of the published models, one JSON file each."""
