"""Largest numbers that can be meant: what lies beyond them is a slip that would cost hours."""

TIMES = 1000  # of the noise schedule of every family: more steps, or times of a pair, would repeat them
CORRECTIONS = 100  # of a step of an inversion: the mean over them no longer moves
LETTERS = 100_000  # of a prompt: text encoders read 512 tokens at most
RATE = 1  # learning rate: a step of Adam moves each weight by about as much
SECONDS = 10**6  # eleven days of waiting for one answer
RANK = 4096  # of an adapter: no layer that it is added to is wider, so a higher rank adds nothing
ALPHA = 10**6  # of an adapter: 16 is usual, and far above it gradients overflow
CORES = 4096  # of a machine, each of which can do the work of a thread or a process
IMAGES = 10**6  # of a prompt: calibration compares each with each
PAIRS = 10**6  # of an optimizer step, each of which takes passes of its own
STEPS = 10**9  # of training: decades
SHARES = 10**6  # of a policy in a soup; beyond it the sum has no digit of the weights left
SCENES = 25_000  # prompts of a split in the shapes world, whose grammar has about 21,000 for training
SHARD = 2**31 - 1  # prompts of a row of a pool, whose positions are 64-bit numbers
