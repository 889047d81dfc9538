//! What the repository says of itself: its layers, the names of its types, its README, its document on soundness.

mod repository {
    mod layers;
    mod names;
    mod readme;
    mod soundness;
}
