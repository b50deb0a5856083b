"""The policy learner and the critic: DeepSpeed engines on one or more ranks, which take ragged micro-batches."""
