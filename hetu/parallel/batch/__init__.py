"""Who gets which documents of a batch: context groups, micro-batches and pieces, made of the documents' lengths."""
