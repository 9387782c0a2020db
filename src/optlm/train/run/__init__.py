"""What a training run leaves on disk: its folder, checkpoints, log, logbook and pictures."""
