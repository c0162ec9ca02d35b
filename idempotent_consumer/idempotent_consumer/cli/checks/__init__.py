"""What ``doctor`` looks at: a file for each place where the guarantee can be broken."""
