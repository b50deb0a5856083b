"""Trackers that get a run's metrics and texts in addition to its folder: TensorBoard, W&B, MLflow, Trackio, SwanLab,
or a user's class."""
