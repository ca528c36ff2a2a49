"""How sparsity is spread over layers: profiles, and patterns chosen layer by layer under a budget."""
