"""Raw images -> packed dataset -> batches."""
