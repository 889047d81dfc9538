//! The table of modules under many schedules of threads: its own source, with locks that try them.

use std::sync::atomic::{AtomicUsize, Ordering};

use shuttle::thread;

use once_table::OnceTable;
use sync::Arc;

#[path = "../src/once_table.rs"]
mod once_table;

/// In the place of `src/sync.rs`.
mod sync {
    pub(crate) use shuttle::sync::{Arc, Mutex};
    pub(crate) use std::sync::PoisonError;
}

/// Schedules that are tried of what has too many for all of them.
const SCHEDULES: usize = 3_000;

/// Runs threads, and waits for them.
fn together<T: Send + 'static>(threads: Vec<Box<dyn FnOnce() -> T + Send>>) -> Vec<T> {
    let threads: Vec<_> = threads.into_iter().map(thread::spawn).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// The runtime's two tables: names as they were asked for, and the modules that are found.
#[derive(Default)]
struct Modules {
    wanted: OnceTable<Vec<&'static str>, usize>,
    found: OnceTable<&'static str, usize>,
    opened: AtomicUsize,
}

impl Modules {
    fn load(&self, names: &[&'static str], source: Result<(), &'static str>) -> Result<usize, &'static str> {
        self.wanted.get_or_try_make(names.to_vec(), || {
            source?;
            // The source has the last of the names.
            self.found.get_or_try_make(names.last().unwrap(), || {
                thread::yield_now();
                Ok(self.opened.fetch_add(1, Ordering::SeqCst))
            })
        })
    }
}

#[test]
fn two_threads_make_a_value_once_under_all_schedules() {
    shuttle::check_dfs(
        || {
            let (table, made) = (Arc::<OnceTable<u8, usize>>::default(), Arc::<AtomicUsize>::default());
            let thread = || -> Box<dyn FnOnce() -> _ + Send> {
                let (table, made) = (table.clone(), made.clone());
                Box::new(move || {
                    table.get_or_try_make(7, || Ok::<_, ()>(made.fetch_add(1, Ordering::SeqCst))).unwrap()
                })
            };
            assert_eq!(together(vec![thread(), thread()]), [0, 0]);
            assert_eq!(table.keys(), [7]);
            assert_eq!(made.load(Ordering::SeqCst), 1);
        },
        None,
    );
}

#[test]
fn many_threads_load_each_module_once() {
    shuttle::check_random(
        || {
            let modules = Arc::<Modules>::default();
            let threads = (0..6).map(|thread| -> Box<dyn FnOnce() -> _ + Send> {
                let modules = modules.clone();
                let names: &[_] = [&["old", "norm"][..], &["norm"], &["rope"]][thread % 3];
                Box::new(move || modules.load(names, Ok(())).unwrap())
            });
            let loaded = together(threads.collect());
            assert_eq!(modules.opened.load(Ordering::SeqCst), 2);
            assert_eq!((loaded[..3].to_vec(), loaded[0]), (loaded[3..].to_vec(), loaded[1]));
            assert_ne!(loaded[0], loaded[2]);
        },
        SCHEDULES,
    );
}

#[test]
fn what_failed_is_tried_again_by_the_next_one() {
    shuttle::check_random(
        || {
            let modules = Arc::<Modules>::default();
            let threads = (0..4).map(|thread| -> Box<dyn FnOnce() -> _ + Send> {
                let modules = modules.clone();
                let source = if thread % 2 == 0 { Err("not there yet") } else { Ok(()) };
                Box::new(move || modules.load(&["norm"], source))
            });
            for (thread, loaded) in together(threads.collect()).into_iter().enumerate() {
                // Whoever comes after the one that succeeded has its module.
                assert!(loaded == Ok(0) || thread % 2 == 0 && loaded == Err("not there yet"), "{loaded:?}");
            }
            assert_eq!(modules.opened.load(Ordering::SeqCst), 1);
        },
        SCHEDULES,
    );
}
