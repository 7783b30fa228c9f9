"""The math of REINFORCE++ and of the estimators it is compared with: pure functions, no communication."""
