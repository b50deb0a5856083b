"""The policy learner and the critic: DeepSpeed engines on one or more ranks, fed with ragged micro-batches."""
