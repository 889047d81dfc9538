//! Every attention where sums have nothing to add, or scores are far below zero.
#![cfg(feature = "cudarc")]

mod common;

mod attention_edges_gpu {
    mod empty_states;
    mod very_negative_scores;
}
