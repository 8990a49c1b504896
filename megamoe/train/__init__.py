"""Train: the loop (trainer.py), its state, the guard around each step, resume and rollback, watchdog, stop requests."""
