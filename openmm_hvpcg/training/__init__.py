"""Labels, models, losses and the trainer."""
