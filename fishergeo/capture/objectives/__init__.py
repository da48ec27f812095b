"""What is differentiated: one scalar an example, by the kind of Fisher, its labels and its weights."""
