"""A run of training, from its configuration to its exit status; the only folder for Composer."""
