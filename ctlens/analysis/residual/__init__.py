"""Analyses of the residual stream: how far training moves it, and how alike two trainings move it."""
