"""How sure a model is, and how far that can be believed.

`reading` gives every distribution of a text, `measures` what each says of its own certainty, and
`showing` colours tokens by it.
"""
