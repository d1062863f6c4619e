"""A cluster job rehearsed on one CPU: some of its ranks take real steps, without numbers and without the others."""
