"""Infrastructure below the method: files, threads, processes, fingerprints, optimizers and the hub."""
