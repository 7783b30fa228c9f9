"""The math of REINFORCE++ and of the other advantage estimators: pure functions without communication."""
