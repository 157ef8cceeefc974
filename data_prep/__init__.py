"""`rxt-data`: from text and conversations to a tokenizer and to datasets that `rxt_dist` trains on."""
