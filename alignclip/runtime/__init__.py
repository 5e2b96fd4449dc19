"""The process itself: terminal, threads, launcher, process group, versions."""
