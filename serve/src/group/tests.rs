use std::{
    env,
    io::Write,
    net::{Shutdown, TcpListener, TcpStream},
    process::{self, Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use test_support::alone::{assert_passed, process_of};

use super::*;

/// How long ranks of tests wait for each other.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Tells a process that runs a test as which rank it does so, and where rank 0 listens.
const PLACE: &str = "FLASHINFER_RS_TEST_RANK";

fn settings(cache_tokens: &str) -> Settings {
    [("--cache-tokens".to_owned(), cache_tokens.to_owned())].into()
}

/// How a rank of so many meets the others at a port.
fn rendezvous(rank: usize, size: usize, port: u16, timeout: Duration) -> Rendezvous {
    let placement =
        Placement { rank: Rank { rank, size }, local_rank: rank, address: "127.0.0.1".into(), port };
    Rendezvous { placement, secret: "secret".into(), timeout }
}

/// A listener of rank 0, and its port.
fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Has a thread do something with each of so many ranks, and gives what came of it, by rank.
pub fn with_ranks<T: Send>(size: usize, work: impl Fn(Arc<Group>) -> T + Sync) -> Vec<T> {
    let (listener, port) = listener();
    // Ranks wait for each other on threads that compute.
    let threads = || rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let work = &|group: Group| threads().install(|| work(Arc::new(group)));
    thread::scope(|scope| {
        let others = (1..size).map(|rank| {
            scope.spawn(move || {
                let group = rendezvous(rank, size, port, TIMEOUT).meet(Settings::new(), |_| {}).unwrap();
                work(group)
            })
        });
        let others: Vec<_> = others.collect();
        let first = rendezvous(0, size, port, TIMEOUT)
            .meet_at(listener, Settings::new(), |_| {}, &mut || Ok(()))
            .unwrap();
        let first = work(first);
        std::iter::once(first).chain(others.into_iter().map(|other| other.join().unwrap())).collect()
    })
}

/// A port that the system gives nobody who asks for any.
fn free_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let of_process = (process::id() % 1000) as u16 * 10;
    20000 + of_process + TAKEN.fetch_add(1, Ordering::Relaxed) % 10
}

/// For each set of variables, has two processes that run the same test, of this name, alone and with these do
/// something as ranks. Both have passed then.
pub fn with_two_processes(test: &str, variables: &[&[(&str, &str)]], work: impl FnOnce(Arc<Group>)) {
    if let Ok(place) = env::var(PLACE) {
        let (rank, port) = place.split_once(' ').unwrap();
        let there = rendezvous(rank.parse().unwrap(), 2, port.parse().unwrap(), TIMEOUT);
        return work(Arc::new(there.meet(Settings::new(), |_| {}).unwrap()));
    }
    for variables in variables {
        let port = free_port();
        let mut ranks = [0, 1].map(|rank| {
            let mut process = process_of(test);
            process.envs(variables.iter().copied()).env(PLACE, format!("{rank} {port}"));
            process.stdout(Stdio::piped()).spawn().unwrap()
        });
        let end = Instant::now() + 2 * TIMEOUT;
        let is_over = |rank: &mut Child| rank.try_wait().unwrap().map(|status| status.success());
        loop {
            let over = ranks.each_mut().map(is_over);
            // One that waits for the other does so for ever.
            if over.contains(&Some(false)) || Instant::now() > end {
                ranks.iter_mut().for_each(|rank| rank.kill().unwrap());
            }
            if over.iter().all(Option::is_some) {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let outputs = ranks.map(|rank| rank.wait_with_output().unwrap());
        outputs.iter().for_each(|output| drop(assert_passed(output)));
    }
}

#[test]
fn two_processes_are_ranks() {
    with_two_processes("group::tests::two_processes_are_ranks", &[&[]], |group| {
        let mut numbers = [group.rank().rank as f32 + 1.0];
        group.take_sums().unwrap().all_reduce(&mut numbers).unwrap();
        assert_eq!(numbers, [3.0]);
    });
}

#[test]
fn ranks_add_and_gather_numbers() {
    let all = with_ranks(3, |group| {
        let rank = group.rank().rank;
        let mut sums = group.take_sums().unwrap();
        assert!(group.take_sums().is_none());
        // More than is sent at once.
        let mut numbers: Vec<_> = (0..100_000).map(|at| (at * (rank + 1)) as f32).collect();
        sums.all_reduce(&mut numbers).unwrap();
        let mut none = [];
        sums.all_reduce(&mut none).unwrap();
        let gathered = sums.all_gather(&vec![rank as f32; 2 - rank]).unwrap();
        group.end().unwrap();
        (numbers, gathered)
    });
    for (numbers, gathered) in all {
        assert!(numbers.iter().enumerate().all(|(at, number)| *number == (6 * at) as f32));
        assert_eq!(gathered, [vec![0.0, 0.0], vec![1.0], vec![]]);
    }
}

#[test]
fn all_ranks_hear_what_all_say() {
    let all = with_ranks(3, |group| {
        let rank = group.rank().rank;
        let said = [0, 1].map(|round| group.gather(format!("{rank} {round}")).unwrap());
        group.end().unwrap();
        said
    });
    for said in all {
        assert_eq!(said, [0, 1].map(|round| [0, 1, 2].map(|rank| format!("{rank} {round}"))));
    }
}

#[test]
fn what_ranks_add_has_to_be_as_long() {
    let all = with_ranks(2, |group| {
        let mut numbers = vec![0.0; 3 + group.rank().rank];
        let problem =
            group.take_sums().unwrap().all_reduce(&mut numbers).err().map(|error| error.to_string());
        // Its connection goes with it.
        group.failure().fail("enough");
        problem
    });
    assert!(all[0].as_ref().unwrap().contains("a rank adds 4 numbers to 3"), "{all:?}");
    assert!(all[1].is_some());
}

#[test]
fn messages_go_to_rank_0_and_from_it_to_all() {
    let all = with_ranks(3, |group| {
        let rank = group.rank().rank;
        if rank > 0 {
            group.send(&format!("of {rank}")).unwrap();
            let heard = group.receive::<String>().unwrap().unwrap();
            group.end().unwrap();
            return vec![heard];
        }
        let mut heard = Vec::from_iter(group.receive_within::<String>(Duration::ZERO).unwrap());
        while heard.len() < 2 {
            heard.extend(group.receive_within::<String>(TIMEOUT).unwrap());
        }
        group.send(&"to all").unwrap();
        group.end().unwrap();
        heard.sort();
        heard
    });
    let to_all = vec![(0, "to all".to_owned())];
    assert_eq!(all, [vec![(1, "of 1".into()), (2, "of 2".into())], to_all.clone(), to_all]);
}

#[test]
fn when_a_rank_ends_all_hear_which_it_was() {
    let all = with_ranks(3, |group| {
        match group.rank().rank {
            // Without a word, as a process that is killed.
            2 => group.failure().connections_for_tests().iter().for_each(|connection| {
                connection.shutdown(Shutdown::Both).unwrap();
            }),
            _ => assert!(group.receive::<String>().is_err()),
        }
        let begin = Instant::now();
        while group.failure().reason() == "the ranks have ended" && begin.elapsed() < TIMEOUT {
            thread::sleep(Duration::from_millis(1));
        }
        group.failure().reason()
    });
    assert!(all[0].starts_with("rank 2 (127.0.0.1, process ") && all[0].ends_with(") has ended"), "{all:?}");
    // It hears of rank 0, which ends, too.
    assert!(all[1].starts_with("rank 0 (127.0.0.1)"), "{all:?}");
}

#[test]
fn a_rank_that_fails_says_why() {
    let reasons = with_ranks(2, |group| {
        if group.rank().rank == 1 {
            group.say_failed("there is no GPU");
            // Until rank 0 has heard it.
            return group.receive::<String>().unwrap_err().to_string();
        }
        group.receive::<String>().unwrap_err().to_string()
    });
    assert!(reasons[0].contains("rank 1") && reasons[0].ends_with("failed: there is no GPU"), "{reasons:?}");
}

#[test]
fn ranks_that_are_done_have_not_failed() {
    let ends = with_ranks(3, |group| {
        if group.rank().rank == 0 {
            group.send(&"the last").unwrap();
            group.end().unwrap();
        } else {
            assert_eq!(group.receive().unwrap(), Some((0, "the last".to_owned())));
            assert_eq!(group.receive::<String>().unwrap(), None);
            group.end().unwrap();
        }
        // What it says now, nobody heeds.
        group.say_failed("late");
        group.failure().clone()
    });
    assert!(ends.iter().all(|failure| failure.reason() == "the ranks have ended"));
}

#[test]
fn a_rank_that_is_done_before_rank_0_has_failed() {
    let reasons = with_ranks(3, |group| {
        match group.rank().rank {
            // Without a word, as one that panics.
            1 => String::new(),
            _ => group.receive::<String>().unwrap_err().to_string(),
        }
    });
    assert!(
        reasons[0].starts_with("rank 1 ") && reasons[0].ends_with("it ended before rank 0 was done"),
        "{reasons:?}"
    );
    assert!(reasons[2].starts_with("rank 0 "), "{reasons:?}");
}

/// Somebody who says a little at a time keeps nobody from meeting, and is not waited for.
#[test]
fn who_dawdles_is_not_waited_for() {
    let (listener, port) = listener();
    let begin = Instant::now();
    let dawdlers: Vec<_> = (0..8).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    thread::scope(|scope| {
        let joined =
            scope.spawn(move || rendezvous(1, 2, port, TIMEOUT).meet(Settings::new(), |_| {}).unwrap());
        for mut dawdler in &dawdlers {
            dawdler.write_all(&[1]).unwrap();
        }
        let first = rendezvous(0, 2, port, TIMEOUT);
        let group = first.meet_at(listener, Settings::new(), |_| {}, &mut || Ok(())).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5));
        group.end().unwrap();
        joined.join().unwrap();
    });
}

#[test]
fn rank_0_stops_waiting_where_a_rank_cannot_come() {
    let (listener, port) = listener();
    let mut rounds = 0;
    let mut check = || {
        rounds += 1;
        if rounds == 3 { Err("rank 1 ended before the ranks had met: exit status: 1".into()) } else { Ok(()) }
    };
    let met = rendezvous(0, 2, port, TIMEOUT).meet_at(listener, Settings::new(), |_| {}, &mut check);
    assert_eq!(met.unwrap_err().to_string(), "rank 1 ended before the ranks had met: exit status: 1");
}

/// What became of rank 0 and of another rank.
fn meet_pair(
    first: (&Rendezvous, Settings),
    other: (&Rendezvous, Settings),
    listener: TcpListener,
) -> [Result<Group>; 2] {
    thread::scope(|scope| {
        let joined = scope.spawn(|| other.0.meet(other.1, |_| {}));
        let first = first.0.meet_at(listener, first.1, |_| {}, &mut || Ok(()));
        [first, joined.join().unwrap()]
    })
}

#[test]
fn ranks_that_were_started_otherwise_are_refused() {
    let problems = |first: Settings, change: fn(&mut Rendezvous), theirs: Settings| {
        let (listener, port) = listener();
        let mut other = rendezvous(1, 2, port, TIMEOUT);
        change(&mut other);
        meet_pair((&rendezvous(0, 2, port, TIMEOUT), first), (&other, theirs), listener)
            .map(|met| met.expect_err("they are refused").to_string())
    };
    let [ours, theirs] = problems(settings("1"), |_| {}, settings("2"));
    assert_eq!(ours, "--cache-tokens of rank 1 is 2, and of rank 0 1; expected the same");
    assert!(theirs.contains("rank 0 refused rank 1") && theirs.ends_with(&ours), "{theirs}");
    let [ours, _] = problems(settings("1"), |_| {}, Settings::new());
    assert!(ours.starts_with("--cache-tokens of rank 1 is none, and of rank 0 1"), "{ours}");
    let [ours, _] = problems(Settings::new(), |other| other.placement.rank.size = 3, Settings::new());
    assert_eq!(ours, "rank 1 is one of 3, and rank 0 one of 2");
    let [ours, _] = problems(Settings::new(), |other| other.placement.rank.rank = 2, Settings::new());
    assert!(ours.contains("a process is rank 2 of 2; expected 1 to 1"), "{ours}");
}

#[test]
fn strangers_do_not_take_the_place_of_a_rank() {
    let (listener, port) = listener();
    thread::scope(|scope| {
        scope.spawn(move || {
            // Another program, one that says nothing, and a rank of others.
            let mut http = TcpStream::connect(("127.0.0.1", port)).unwrap();
            http.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
            let stranger = Rendezvous { secret: String::new(), ..rendezvous(1, 2, port, TIMEOUT) };
            let problem = stranger.meet(Settings::new(), |_| {}).unwrap_err().to_string();
            assert!(problem.contains("secret"), "{problem}");
            drop(rendezvous(1, 2, port, TIMEOUT).meet(Settings::new(), |_| {}).unwrap());
        });
        rendezvous(0, 2, port, TIMEOUT).meet_at(listener, Settings::new(), |_| {}, &mut || Ok(())).unwrap();
    });
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let short = Duration::from_millis(200);
    let (listener, port) = listener();
    let problem =
        rendezvous(0, 3, port, short).meet_at(listener, Settings::new(), |_| {}, &mut || Ok(())).unwrap_err();
    assert_eq!(problem.to_string(), "of 3 ranks, 1, 2 did not come in 0 s");
    let problem = rendezvous(1, 2, port, short).meet(Settings::new(), |_| {}).unwrap_err().to_string();
    assert!(problem.contains(&format!("rank 1 cannot reach rank 0 at 127.0.0.1 port {port}")), "{problem}");
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let problem = rendezvous(0, 2, port, short).meet(Settings::new(), |_| {}).unwrap_err().to_string();
    assert!(problem.contains("cannot listen") && problem.contains("MASTER_PORT"), "{problem}");
}
