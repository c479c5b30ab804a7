"""Other people's training loops: Hugging Face's Trainer and TRL's trainers, on a model with a subspace method."""

from dist_subspace.trainers.mixin import TrainerMixin

__all__ = ["TrainerMixin"]
