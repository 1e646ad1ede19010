"""Data: the tokenizer, the preparation of documents, and the datasets that training reads."""
