"""What Lightning needs: a session on the module, checkpoints of every strategy, optimizer states, reloading."""
