"""Log-sum-exp of scaled similarities, apart over the keys of the query's own label and over the others."""
