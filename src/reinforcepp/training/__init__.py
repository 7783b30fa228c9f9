"""The trainers: reward model, SFT and REINFORCE++."""
