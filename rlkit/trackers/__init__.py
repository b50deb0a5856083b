"""Where the numbers and texts of a run go besides its folder: TensorBoard, W&B, MLflow, Trackio, SwanLab, or a class
of the user's."""
