"""Distillation and fine-tuning on the Trainer: losses, trainers, options, recipe."""
