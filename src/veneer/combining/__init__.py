"""Adapters as sums: a new adapter whose change is a weighted combination of others', of any method.

What is combined is the change of each weight, W' = W + Σ wᵢ (W'ᵢ − W), and not the numbers of the adapters: products of sums of factors, (Σ Bᵢ)(Σ Aᵢ),
would have terms Bᵢ Aⱼ that no adapter has learnt. Only the forms that are defined on the factors (`ties` and its like without `_svd`) work there.
"""
