"""What any program needs: files, threads, processes, fingerprints, the hub, optimizers."""
