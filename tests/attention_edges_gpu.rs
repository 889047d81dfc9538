//! Every attention where sums have nothing to add or much, or scores are far below zero.
#![cfg(feature = "cudarc")]

mod common;

mod attention_edges_gpu {
    mod empty_states;
    mod running_sums;
    mod very_negative_scores;
}
