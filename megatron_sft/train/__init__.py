"""The training loop: loss, step, optimizer, validation."""
