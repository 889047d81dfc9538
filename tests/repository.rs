//! What the repository says of itself: its dependencies, layers and names, its README, its document on
//! soundness.

mod repository {
    mod dependencies;
    mod layers;
    mod names;
    mod readme;
    mod soundness;
}
