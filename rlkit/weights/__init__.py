"""What both ends of a weight transfer share: bundles and buckets, receipts, and gloo between CPUs. A leaf package."""
