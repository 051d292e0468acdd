"""What `TaskModule` is made of: tasks, losses, metrics, loading, optimization, predictions."""
