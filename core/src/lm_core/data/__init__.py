"""Documents, corpora and packed batches of training rows."""
