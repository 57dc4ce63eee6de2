"""The guarantee matrix: situations of real training runs (rows) and ways to prune (columns), every cell executed."""
