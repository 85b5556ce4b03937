"""The study of personalising: what each method gives and costs, on subjects that the bundled model has never seen. See README.md."""
