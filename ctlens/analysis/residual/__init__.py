"""How training moves the residual stream."""
