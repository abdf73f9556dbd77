"""From AA frames to projected forces and Hessian-vector products."""
