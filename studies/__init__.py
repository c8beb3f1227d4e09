"""What figures show that is more than a table of accuracies: one file a kind, each measures and draws."""
