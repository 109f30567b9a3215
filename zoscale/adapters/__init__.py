"""What is trained: adapters beside the model, which of them are kept, or weights of its own."""
