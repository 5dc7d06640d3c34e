"""What is wrong with a checkpoint on this machine: from the bytes of its files to the sense of its answers."""
