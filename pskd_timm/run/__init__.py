"""What a run needs around its page: launch, folder, checkpoints, stopping, tracking."""
