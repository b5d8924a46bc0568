"""The training loop: any model, any loss, resumable."""
