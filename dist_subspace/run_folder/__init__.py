"""The folder of a run: what everything in it is called, and the format of each file. Local; knows neither torch nor a method."""

from dist_subspace.run_folder.folder import CheckpointFolder, RunFolder

__all__ = ["CheckpointFolder", "RunFolder"]
