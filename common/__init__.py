"""What every folder uses and nothing of the model: flags, files, figures, the hardware."""
