//! Many receivers of one queue, some of which give up, and the bounds in bytes.
#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// An item of so many bytes.
#[derive(Debug, PartialEq, Eq)]
struct Item(usize);

impl Weigh for Item {
    fn weight(&self) -> usize {
        self.0
    }
}

fn queue(items: usize, bytes: usize, budget: &Arc<Budget>) -> Arc<Queue<Item>> {
    Arc::new(Queue::new(Capacity { items, bytes }, Arc::clone(budget)))
}

fn unbounded() -> Arc<Queue<Item>> {
    queue(usize::MAX, usize::MAX, &Arc::new(Budget::new(usize::MAX)))
}

fn give(queue: &Queue<Item>) {
    queue.push(Item(1)).unwrap();
    queue.wake();
}

#[test]
fn each_item_wakes_a_thread_that_waits() {
    const THREADS: usize = 16;
    let queue = unbounded();
    let received = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while queue.receive().wait().is_some() {
                    received.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        // Some give up after a moment, again and again, and must not take a wake with them.
        for _ in 0..4 {
            scope.spawn(|| {
                while queue.ended().is_none() {
                    if queue.receive().wait_for(Duration::from_micros(50)).is_some() {
                        received.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        let started = Instant::now();
        for sent in 1..=2000 {
            // All wait, so nothing but the wake brings the item to one of them.
            while queue.lock().threads < THREADS {
                assert!(started.elapsed() < PATIENCE, "no thread waits");
                std::thread::yield_now();
            }
            give(&queue);
            while received.load(Ordering::SeqCst) < sent {
                assert!(started.elapsed() < PATIENCE, "item {sent} was not received");
                std::thread::yield_now();
            }
        }
        queue.end(Ended::Closed);
    });
    assert_eq!(received.into_inner(), 2000);
}

#[test]
fn items_that_come_together_wake_as_many() {
    let queue = unbounded();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| queue.receive().wait())).collect();
        while queue.lock().threads < 8 {
            assert!(started.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        // First all items, then all wakes.
        (0..8).for_each(|_| queue.push(Item(1)).unwrap());
        (0..8).for_each(|_| queue.wake());
        assert!(threads.into_iter().all(|thread| thread.join().unwrap().is_some()));
    });
}

/// A waker that counts.
struct Counter(AtomicUsize);

impl std::task::Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll<'a>(receive: &mut Receive<'a, Item>, counter: &Arc<Counter>) -> Poll<Option<Item>> {
    let waker = Waker::from(Arc::clone(counter));
    Pin::new(receive).poll(&mut Context::from_waker(&waker))
}

#[test]
fn a_task_that_is_dropped_after_its_wake_passes_it_on() {
    let queue = unbounded();
    let counters: Vec<_> = (0..3).map(|_| Arc::new(Counter(AtomicUsize::new(0)))).collect();
    let mut tasks: Vec<_> = counters.iter().map(|_| queue.receive()).collect();
    for (task, counter) in tasks.iter_mut().zip(&counters) {
        // Polled again it is still entered once.
        assert!(poll(task, counter).is_pending() && poll(task, counter).is_pending());
    }
    let woken =
        || counters.iter().map(|counter| counter.0.load(Ordering::SeqCst)).collect::<Vec<_>>();
    give(&queue);
    assert_eq!(woken(), [1, 0, 0]);
    // A task that was not woken is dropped: nothing happens.
    drop(tasks.remove(1));
    assert_eq!(woken(), [1, 0, 0]);
    // The one that was woken.
    drop(tasks.remove(0));
    assert_eq!(woken(), [1, 0, 1]);
    assert_eq!(poll(&mut tasks[0], &counters[2]), Poll::Ready(Some(Item(1))));
    drop(tasks);
    assert!(queue.lock().tasks.is_empty());
    // The end wakes all.
    let mut tasks: Vec<_> = counters.iter().map(|_| queue.receive()).collect();
    for (task, counter) in tasks.iter_mut().zip(&counters) {
        assert!(poll(task, counter).is_pending());
    }
    queue.end(Ended::Closed);
    assert_eq!(woken(), [2, 1, 2]);
    assert_eq!(poll(&mut tasks[1], &counters[1]), Poll::Ready(None));
}

#[test]
fn many_tasks_receive_while_others_are_cancelled() {
    const ITEMS: usize = 16_000;
    const BATCH: usize = 32;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_time()
        .build()
        .unwrap();
    let queue = unbounded();
    let received = Arc::new(AtomicUsize::new(0));
    let work = async {
        let mut tasks = Vec::new();
        for _ in 0..8 {
            let (queue, received) = (Arc::clone(&queue), Arc::clone(&received));
            tasks.push(tokio::spawn(async move {
                while queue.receive().await.is_some() {
                    received.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        let mut sent = 0;
        while sent < ITEMS {
            // They wait, give up, some after their wake, and do not come back.
            let give_up: Vec<_> = (0..BATCH)
                .map(|n| {
                    let (queue, received) = (Arc::clone(&queue), Arc::clone(&received));
                    tokio::spawn(async move {
                        let patience = async {
                            for _ in 0..n % 5 {
                                tokio::task::yield_now().await;
                            }
                        };
                        tokio::select! {
                            biased;
                            next = queue.receive() => if next.is_some() {
                                received.fetch_add(1, Ordering::SeqCst);
                            },
                            () = patience => {}
                        }
                    })
                })
                .collect();
            for _ in 0..BATCH {
                give(&queue);
                sent += 1;
                tokio::task::yield_now().await;
            }
            for task in give_up {
                task.await.unwrap();
            }
            while received.load(Ordering::SeqCst) < sent {
                tokio::task::yield_now().await;
            }
        }
        queue.end(Ended::Closed);
        for task in tasks {
            task.await.unwrap();
        }
    };
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await }).unwrap();
    assert_eq!(received.load(Ordering::SeqCst), ITEMS);
}

#[test]
fn queues_are_bounded_in_items_in_bytes_and_together() {
    let budget = Arc::new(Budget::new(1000));
    let (a, b) = (queue(3, 500, &budget), queue(100, 500, &budget));
    assert_eq!(a.push(Item(600)), Ok(()), "one may exceed the queue's bytes");
    assert_eq!(a.push(Item(1)), Err(Item(1)));
    assert_eq!(b.push(Item(300)), Ok(()));
    assert_eq!(b.push(Item(101)), Err(Item(101)), "all together");
    assert_eq!(b.push(Item(100)), Ok(()));
    assert_eq!(a.try_take(), Some(Item(600)));
    assert_eq!(b.push(Item(101)), Err(Item(101)), "its own bytes");
    assert_eq!(b.push(Item(100)), Ok(()));
    for _ in 0..3 {
        assert_eq!(a.push(Item(1)), Ok(()));
    }
    assert_eq!(a.push(Item(1)), Err(Item(1)), "items");
    drop((a, b));
    assert_eq!(budget.used.load(Ordering::SeqCst), 0, "everything is given back");
}
