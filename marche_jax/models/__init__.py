"""The networks, as Flax modules without state, and the diffusion process.

Read `mar.py` first (encoder, decoder, patches), then `head.py` (the MLP that denoises a token),
`diffusion.py` (its noise process, in float64 tables) and `vae.py` (the KL autoencoder of pixels).
"""
